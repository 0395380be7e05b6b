"""Print the peak memory of one call: a fresh process that ``measure`` starts for each provider.

``python -m benchmarks.operator.peak REQUEST`` takes a JSON object: the fields of a ``Case``
with "provider", "kind", "mode" and "ott_python".
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace

from benchmarks.operator import jobs
from benchmarks.operator.cases import Case
from benchmarks.operator.jobs import Task
from benchmarks.operator.providers import PROVIDERS


def main(request: str) -> None:
    values = json.loads(request)
    jobs.ott_python = values.pop("ott_python")
    provider = PROVIDERS[values.pop("provider")]
    task = Task(values.pop("kind"), values.pop("mode"), Case.from_dict(values))
    # The tiny case loads the libraries and starts the threads before the memory is measured.
    tiny = replace(task.case, batch=1, n=8, m=8, dim=8, max_iter=2)
    for case in (tiny, task.case):
        job = provider.start(task._replace(case=case))
        peak_mb = job.peak_megabytes()
        job.close()
    print(peak_mb)


if __name__ == "__main__":
    main(sys.argv[1])
