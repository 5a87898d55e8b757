"""Two arms with the same seeds, the statistics of their difference, and the report.

``plan`` and ``runner`` train ``runs``, ``records`` reads what they leave behind, ``table`` holds every value once,
``statistics`` gives intervals and verdicts, ``figures`` and ``report`` show it.
"""
