"""Further cases for the mapper, in the form of the graft matrix: other libraries, other styles, the same families.

A case is data (see tests/graft_matrix/core.py): a source, a target, how each runs, and a hand-written oracle that
proves that it can be solved. The oracles are never read by the project.

    python -m tests.further_cases oracle [modality | part of a name]
    python -m tests.further_cases zoo [modality | part of a name]
    python -m tests.further_cases zoo-static [modality | part of a name]
"""
