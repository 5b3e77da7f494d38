"""Rendered scenes, whose cameras and depths are exact."""
