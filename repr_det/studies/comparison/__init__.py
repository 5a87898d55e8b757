"""Two arms with the same seeds, the statistics of their difference, and the report.

``runs`` says what a run is and which may be compared, ``records`` what it leaves behind, ``plan`` and ``runner`` train;
``matches`` computes COCO AP over resampled images, ``statistics`` intervals and verdicts; ``table`` holds every value
once, ``results`` puts all together, ``figures``, ``detections`` and ``report`` show it.
"""
