"""Two arms with the same seeds, the statistics of their difference, and the report.

``command`` plans, ``runner`` trains, ``records`` reads what runs leave behind, ``table`` holds every value once,
``statistics`` gives intervals and verdicts, ``report`` shows them.
"""
