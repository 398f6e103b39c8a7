"""Images without an init become machines: what is missing is found out and installed, once per image. Layer 5.

`lifecycle` calls `bootable` when a machine is made; docs/adapting.md tells the rules. From the bottom:

    listing    what is in an image, read from its layers
    facts      what of that matters here: init, distribution, package manager; remembered per image
    recipes    what to install in which distribution: data files, berth's and the user's
    workshop   the throw-away machine that the recipe is carried out in
    bootable   the decision, and the image that comes of it
"""

from berth.adapt.bootable import AdaptMode, Bootable, make_bootable

__all__ = ["AdaptMode", "Bootable", "make_bootable"]
