"""YAML text -> Recipe; every error carries file:line:column."""
