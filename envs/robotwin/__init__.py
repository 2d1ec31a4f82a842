"""RoboTwin 2.0 task classes behind gymnasium."""
