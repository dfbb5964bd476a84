"""Groups of runs from one config: points, job arrays, results."""
