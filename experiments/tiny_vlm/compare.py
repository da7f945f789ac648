"""The difference between two finished runs, paired by sample, in points with a 95 % interval.

python experiments/tiny_vlm/compare.py outputs/fopru_rank-* outputs/fopru_row-*
"""

from __future__ import annotations

import sys

from tokenreduce.evaluation import read_records
from tokenreduce.evaluation.statistics import difference

first, second = ({record.id: record for record in read_records(folder)} for folder in sys.argv[1:3])
both = [name for name in first if name in second and first[name].error is None and second[name].error is None]
scores = [[run[name].score for name in both] for run in (first, second)]
estimate = difference(scores[0], scores[1], [first[name].image_id for name in both])
print(
    f"{100 * estimate.value:+.1f} points [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}], {len(both)} samples"
)
