"""What runs on the target: Python 3.8, the standard library, numpy and the target's own TensorRT.

These files are copied into every bundle, where they are the package ``target`` beside ``build_engine.py``. So they
import each other relatively, nothing of ``compress``, and neither numpy nor TensorRT before it is needed.
"""
