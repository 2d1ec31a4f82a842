"""From imagined video to actions: inverse dynamics, action planner, closed-loop comparison."""
