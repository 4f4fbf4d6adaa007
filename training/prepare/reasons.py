"""Why an input is not in the index: one code per reason, with what to do about it. The codes are a promise."""

from __future__ import annotations

from typing import Any

ADVICE: dict[str, str] = {
    "not_an_image": "not a picture, caption or archive by its name; nothing to do",
    "download_failed": "img2dataset could not fetch it; run img2dataset again with --retries",
    "unreadable": "the file could not be read; check its permissions and the disk",
    "corrupt": "damaged or truncated; copy or download it again",
    "too_many_pixels": "larger than scan.max_pixels; scale it down or raise the limit (and the memory per worker)",
    "animated": "more than one frame and scan.animated is 'drop'",
    "duplicate": "the same bytes as an earlier file (dedupe.exact)",
    "near_duplicate": "nearly the same pixels as another picture (dedupe.max_distance)",
    "too_small": "short side below select.min_side; use larger photos or a lower limit",
    "no_face": "no face found; select.no_face=non_human keeps such pictures for method guidance",
    "too_many_faces": "more people than select.max_faces",
    "low_score": "the detector is not sure of the face (select.min_score)",
    "face_too_small": "the face's short side is below select.min_face_side pixels",
    "face_area": "the face covers less of the picture than select.min_face_area",
    "pose": "the head is turned further than select.max_yaw degrees",
    "blurry": "the face is less sharp than select.min_sharpness",
    "low_norm": "the face embedding is shorter than select.min_norm, a sign of a bad picture",
    "no_caption": "no caption found and captions.required is set",
    "same_photo": "another photo of this person is nearly the same (identity.duplicate_cosine)",
    "changed": "the file changed or vanished while the preparation ran; run it again",
}


def dropped(reason: str, detail: str) -> dict[str, Any]:
    """The two columns every stage uses to say that a picture goes no further."""
    if reason not in ADVICE:
        raise KeyError(reason)
    return {"reason": reason, "detail": detail}


def first_drop(*rows: dict[str, Any]) -> dict[str, Any] | None:
    """The first of a picture's stage rows that dropped it, or None while it is alive."""
    return next((row for row in rows if row.get("reason") is not None), None)


def alive(*rows: dict[str, Any]) -> bool:
    """Whether no stage so far dropped the picture."""
    return first_drop(*rows) is None
