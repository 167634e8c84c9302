"""The chapter's questions, answered by experiment; one file for each question.

`python -m training study --list` lists them.
"""

from training.studies import (
    batch_size,
    chapter,
    covariate_shift,
    dropout,
    from_scratch,
    learning_rate,
    order,
    other_norms,
    parts,
    places,
    prediction_batch,
    statistics,
    transforms,
)
from training.studies.study import Study

_MODULES = (
    *(chapter, order, learning_rate, covariate_shift, places, parts, batch_size),
    *(statistics, prediction_batch, dropout, other_norms, transforms, from_scratch),
)
STUDIES: dict[str, Study] = {module.STUDY.name: module.STUDY for module in _MODULES}
"""All studies by name, in the order of the chapter's questions."""
