"""The model of a region: no descriptor is touched and nothing awaits."""
