package vmboot

const sysFinitModule = 273 // Source: asm-generic/unistd.h
