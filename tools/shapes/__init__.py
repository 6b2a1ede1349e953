"""Makes and judges the embedded model `models/shapes/`: `python -m tools.shapes.train` and `python
-m tools.shapes.evaluate`."""
