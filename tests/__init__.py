"""A package, so that one of this name in site-packages does not hide it; nothing of it is installed with slidex."""
