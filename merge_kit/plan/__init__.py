"""Recipe + headers -> Plan: a frozen value that says every read, write and byte in advance."""
