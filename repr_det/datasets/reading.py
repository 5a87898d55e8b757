"""Reading images while training and evaluating: a file that cannot be read is named."""

from collections.abc import Callable
from typing import Any

import cv2

from repr_det.errors import UserError


class NamingMapper:
    """A mapper of Detectron2 data sets whose errors name the image file.

    Args:
        mapper: for example a DatasetMapper.

    Raises:
        UserError: when called with a record whose image cannot be read.
    """

    def __init__(self, mapper: Callable[[dict], Any]) -> None:
        self.mapper = mapper

    def __call__(self, record: dict[str, Any]) -> Any:
        try:
            return self.mapper(record)
        except (OSError, SyntaxError, ValueError, cv2.error) as error:  # what Pillow, Detectron2 and OpenCV raise
            reason = " ".join(str(error).split()) or type(error).__name__
            name = record.get("file_name", f"image {record.get('image_id')}")
            raise UserError(
                f"{name} cannot be read: {reason}; what is saved is untouched: repair the file, then --resume"
            ) from error
