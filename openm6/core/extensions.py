"""Entry points: what other installed packages add to a registry."""

import functools
from importlib.metadata import entry_points
from typing import Any, Literal

from openm6.core.log import get_log

Group = Literal["openm6.tasks", "openm6.sources", "openm6.metrics", "openm6.codecs"]


@functools.cache
def installed(group: Group, kind: type) -> dict[str, Any]:
    """Return the entry points of a group that are of a kind, or subclasses, by name; warn of others and broken ones."""
    found = {}
    for point in entry_points(group=group):
        package = point.dist.name if point.dist is not None else point.value
        try:
            value = point.load()
        # Whatever a foreign package raises on import.
        except Exception as error:
            get_log().warning(f"{point.name!r} of {group} in package {package} does not load ({error}): update it")
            continue
        if isinstance(value, kind) or (isinstance(value, type) and issubclass(value, kind)):
            found[point.name] = value
        else:
            get_log().warning(f"{point.name!r} of {group} in package {package} is no {kind.__name__}: update it")
    return found
