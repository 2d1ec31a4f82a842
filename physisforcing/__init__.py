"""PhysisForcing: video world models trained with physics losses, for planning and policies.

The rooms (``worldmodel``, ``planner``, ``policy``, ``envs``, ``configs``) stand at the top of the repository and are
imported as ``physisforcing.<room>``. Importing this package pulls in none of them.
"""

__version__ = "0.1.0"
