"""Runs a plan for another process: ``python -m target.serve PLAN DEVICE``.

Arrays go in on standard input and come out on standard output, each as a line of JSON with its shape and then its
float32 values. The first line out is ``{"ready": ...}`` or ``{"error": ...}``. Messages go to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import IO, Any

from . import child, cuda, engine


def main() -> int:
    """Serve until standard input ends."""
    import numpy

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what native code prints must not get between the arrays
    path, device = Path(sys.argv[1]), int(sys.argv[2])
    questions = sys.stdin.buffer
    try:
        driver, gpu = child.need_device(device)
        with cuda.Context(device), engine.load(path, gpu, driver) as loaded:
            send(answers, {"ready": loaded.record["key"]})
            for line in questions:
                shape = json.loads(line)["shape"]
                size = int(numpy.prod(shape))
                features = numpy.frombuffer(questions.read(4 * size), numpy.float32).reshape(shape)
                try:
                    output = loaded.run(features)[loaded.outputs[0]].astype(numpy.float32)
                except child.ERRORS as error:
                    send(answers, {"error": str(error)})
                else:
                    send(answers, {"shape": list(output.shape)}, output.tobytes())
    except child.ERRORS as error:
        send(answers, {"error": str(error)})
        return 1
    return 0


def send(stream: IO[bytes], header: Any, data: bytes = b"") -> None:
    """Write a line of JSON and what follows it."""
    stream.write(json.dumps(header).encode() + b"\n" + data)
    stream.flush()


if __name__ == "__main__":
    sys.exit(main())
