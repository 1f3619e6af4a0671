"""JPEG frames of DICOM files -> pixels, by imagecodecs: importing this file tells pydicom of it.

    import jpeg  # noqa: F401
    volume = pydicom.dcmread("a.dcm").pixel_array     # JPEG baseline, extended (12 bits), lossless

pydicom itself knows two decoders of JPEG lossless: pylibjpeg-libjpeg, which is under the GPL, and
GDCM, which ends the whole process at one damaged frame in a hundred. imagecodecs (BSD, around
libjpeg-turbo) gives the same pixels. volumes.read_dicom alone imports this file.
"""

import imagecodecs
from pydicom import uid
from pydicom.pixels import get_decoder

SYNTAXES = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1)


def is_available(syntax):
    """What pydicom asks of a plugin."""
    return syntax in SYNTAXES


def decode_frame(src, runner):
    """A frame's JPEG stream -> its pixels as bytes. pydicom then sees to their sign.

    ValueError unless it is one gray image of the size that the file says.
    """
    frame = imagecodecs.jpeg8_decode(src)  # (rows, columns), uint8 or uint16
    if frame.shape != (runner.rows, runner.columns):
        raise ValueError(f"a frame of {frame.shape}, not ({runner.rows}, {runner.columns})")
    runner.set_option("bits_allocated", 8 * frame.itemsize)  # as the stream has it
    return frame.tobytes()


for syntax in SYNTAXES:
    get_decoder(syntax).add_plugin("imagecodecs", (__name__, "decode_frame"))
