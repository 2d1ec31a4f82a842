"""Video clips with captions: where they come from, what is measured of them, which are kept, and how a trainer reads those."""
