// Package hostdev holds the protocol drivers for storage of this host: "file" for
// regular files and "host_device" for block and character devices.
//
// A node keeps up to three descriptors: one for data, a duplicate of it that
// carries the locks for as long as the node lives, and, with direct I/O on a
// file, a buffered one for a last block that is no whole one.
//
// System calls that may wait for a device hold a slot, see workers. They are
// bounded for each node and in all, so that a hung disk costs the process a
// limited number of threads.
package hostdev
