"""The chapter's questions, answered by experiment; one file each.

`python -m training study --list` names them.
"""

from training.studies import parts, places

STUDIES = {study.name: study for study in (places.STUDY, parts.STUDY)}
"""All studies, in the order of the chapter."""
