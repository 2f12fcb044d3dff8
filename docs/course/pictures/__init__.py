"""The drawing functions of the course, one a lesson."""
