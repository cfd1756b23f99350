"""Methods on models, carried out when their result is asked for."""

from __future__ import annotations

from merge_kit.api.expressions import ModelArithmetic
from merge_kit.api.mergeable import Mergeable
from merge_kit.api.requests import Node, Request, Result


class LazyMerge(Mergeable, ModelArithmetic):
    """Models and a method; nothing is read before the result is asked for.

    It may stand wherever a model may: in arithmetic, in task vectors, in other functions.
    """

    def __init__(self, request: Request) -> None:
        self._request = request

    def request(self) -> Request:
        """Return what is to be merged, and how."""
        return self._request

    def node(self) -> Node:
        """Return this as a model of another merge."""
        return Result(self._request, self)

    def __repr__(self) -> str:
        models = ", ".join(str(model) for model in self._request.models)
        return f"<{self._request.method} of {models}>"
