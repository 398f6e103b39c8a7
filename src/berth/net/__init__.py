"""The network of all machines: one bridge and one address plan for both isolations. docs/network.md. Layer 3.

addresses, subnet      which address each machine has for its life
network                what the engines call: have the network there, publish a machine, take it down
assembly               puts the parts together and right: `hub` (a user's namespace), `firewall`
plan                   texts and argument vectors of all that, as data
attach, tap, passt     the cable of one machine: a veth, a VM's TAP, or where there is none a network of its own
record, processes      what there is, and whether it lives
"""
