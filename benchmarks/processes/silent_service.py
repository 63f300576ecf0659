"""`bulkhead up` without telemetry: it logs errors alone, traces nothing, and its metrics do not count."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram
from prometheus_fastapi_instrumentator import Instrumentator

from benchmarks.processes import as_bulkhead


def main() -> None:
    """What is measured against. The instrumentator's middleware goes, too."""
    for kind, methods in (
        (Counter, ("inc", "labels")),
        (Gauge, ("inc", "dec", "set", "labels")),
        (Histogram, ("observe", "labels")),
    ):
        for method in methods:
            setattr(kind, method, lambda self, *_args, **_labels: self)
    Instrumentator.instrument = lambda self, *_args, **_options: self  # type: ignore[method-assign]  # the point of it
    as_bulkhead.up()


if __name__ == "__main__":
    main()
