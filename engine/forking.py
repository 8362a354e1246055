"""What must be done before a process forks, so that its children cannot hang."""

import cv2


def end_opencv_threads() -> None:
    """End OpenCV's threads in this process: from here on it uses one.

    A child that is forked while they exist inherits their locks in whatever state they are, and can wait for ever in
    its first call of OpenCV. Every fork of ours is one of many, so a thread each is what they should have anyway.
    """
    cv2.setNumThreads(1)
