"""The test of the tester: correct grafts, each with one defect put in, and what the proof says of it.

`models` holds targets as people write them, with switches that make a slip in the code; `families` their references of
real libraries; `defects` the list of all slips and of what is done to weights; `suite` puts them in and measures.
The files `heldout_*` are a second set, of other architectures in other styles, written before the proof was asked
about any of it.
benchmarks/mutations.py runs everything and prints the table of the documentation.
"""
