"""Compares two arms with the same seeds: ``command`` plans, ``runner`` trains, ``records`` reads the runs into a table,
``statistics`` gives intervals and verdicts, ``report`` shows them.
"""
