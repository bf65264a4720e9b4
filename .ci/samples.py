"""The samples of metrics on standard input, as Prometheus' own parser reads them."""

import json
import sys

from prometheus_client.parser import text_string_to_metric_families

families = [*text_string_to_metric_families(sys.stdin.read())]
assert {each.type for each in families} == {"gauge", "counter", "histogram"}
assert all(each.documentation for each in families)
print(json.dumps([sample[:3] for each in families for sample in each.samples]))
