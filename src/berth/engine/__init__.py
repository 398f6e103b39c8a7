"""Engines: the code that realises one isolation each. Layer 3; who comes from above asks `base.Engine` alone.

base         what an engine is, and what it is told of a machine
select       which engine realises which isolation
unpacking    an image's files in a directory, the beginning of every template
common       which folders of the host a machine sees, and what is covered in them
running      what both do alike with a machine that boots, runs and ends
crun, qemu   the engines: `container`, `vm`. Neither knows the other
"""
