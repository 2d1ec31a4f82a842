"""Other people's world models behind core's ``WorldModel``: diffusers pipelines, recorded videos, Python factories."""
