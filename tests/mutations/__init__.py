"""The test of the tester: correct grafts, each with one defect put in, and what the proof says of it.

`models` holds targets as people write them, with switches that make a slip in the code; `families` their references of
real libraries; `defects` the list of all slips and of what is done to weights; `suite` puts them in and measures.
benchmarks/mutations.py runs everything and prints the table of the documentation.
"""
