"""Two arms with the same seeds, the statistics of their difference, and the report.

``command`` plans, ``runner`` trains, ``records`` reads what runs leave behind into one table, ``statistics`` gives
intervals and verdicts, ``report`` shows them.
"""
