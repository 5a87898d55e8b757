"""Both arms of a config with the same seeds, the statistics of their difference, and the report.

``runs`` what a run is, ``runner`` training them, ``records`` what a run leaves behind, ``pairing`` which runs may be
compared; ``matches`` COCO AP over resampled images, ``statistics`` means, intervals, verdicts; ``results`` puts these
together, ``figures``, ``gallery`` and ``report`` show them.
"""
