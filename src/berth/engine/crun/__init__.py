"""The container engine: machines that share the host's kernel, each in a user namespace of its own, run by crun.

engine       `ContainerEngine`: what of it others see
plan, spec   what is to be mounted, limited and run, as data (`launchplan` is its form, `spec` OCI's part of it)
launch       carries a plan out, inside the namespaces; `repair` starts a new agent in there
cgroups      where a container's processes are counted and limited
storage      crun's own notes of a container
changes      what a machine has changed, as a layer
"""
