"""Writes the PrometheusRule of k8s/monitoring from Prometheus's own file of rules: `python -m tests.k8s.rule`."""

from __future__ import annotations

from pathlib import Path
from typing import Final

MONITORING: Final = Path(__file__).resolve().parents[2] / "k8s" / "monitoring"
RULE: Final = MONITORING / "prometheusrule.yaml"
_HEAD: Final = """\
# Made from rules/bulkhead.yaml, since no kustomization can wrap a file: `python -m tests.k8s.rule` writes it anew.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: bulkhead
  labels:
    app.kubernetes.io/name: bulkhead
spec:
"""


def written() -> str:
    """The same groups, to the letter, two columns further in."""
    text = (MONITORING / "rules" / "bulkhead.yaml").read_text()
    groups = text[text.index("groups:") :]
    return _HEAD + "".join(f"  {line}" if line.strip() else line for line in groups.splitlines(keepends=True))


if __name__ == "__main__":
    RULE.write_text(written())
