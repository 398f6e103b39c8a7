package main

// Source: the kernel's include/uapi/asm-generic/unistd.h.
const (
	sysSetns        = 268
	sysFinitModule  = 273
	sysBPF          = 280
	sysPerfOpen     = 241
	sysNameToHandle = 264
	sysOpenByHandle = 265
	sysAddKey       = 217
	sysKeyctl       = 219
	sysOpenTree     = 428
	sysMoveMount    = 429
	sysPidfdOpen    = 434
	sysPidfdGetfd   = 438
	sysMountSetattr = 442
)
