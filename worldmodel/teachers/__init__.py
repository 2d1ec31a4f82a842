"""Teachers: point tracks, depth, frame features."""
