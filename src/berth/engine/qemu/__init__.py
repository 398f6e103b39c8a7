"""The VM engine: machines with a kernel of their own, run by QEMU.

engine       `VmEngine`: what of it others see
plan         how QEMU is started, as data; `launch` gathers what it inherits, and starts it
accel        KVM or emulation; `available` says whether a VM is the better choice here
templates    images as ext4 file systems: `mkfs` makes them in the user namespace, `sizes` says how large
disks        a machine's copy-on-write disk on a template; `qcow2` reads the head of its file
shares       the folders of the host: `sharing` builds the world of `virtiofsd`, which serves them
wiring       the network interface
monitor      a client of QEMU's monitor
changes      what a machine has changed, as a layer; `freezing` keeps a running one still meanwhile
"""
