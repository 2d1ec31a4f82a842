"""World-action policies with the world model as video backbone."""
