"""Two arms with the same seeds, the statistics of their difference, and the report.

``runs`` says what a run is and which may be compared, ``records`` reads what it leaves behind, ``plan`` and ``runner``
train; ``table`` holds every value once, ``statistics`` gives intervals and verdicts, ``figures`` and ``report`` show it.
"""
