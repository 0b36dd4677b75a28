package block

import "strings"

// Perm is a set of permissions that a parent holds on a child, or shares with the other parents (rule G11).
type Perm uint8

const (
	PermConsistentRead Perm = 1 << iota // reads return what was written last
	PermWrite                           // change the data
	PermWriteUnchanged                  // write what is there already (copy-on-read)
	PermResize                          // change the size

	PermAll = PermConsistentRead | PermWrite | PermWriteUnchanged | PermResize
)

var permNames = [...]string{"consistent read", "write", "write unchanged", "resize"}

// String lists the permissions by name, separated by ", ".
func (p Perm) String() string { return strings.Join(bitNames(uint8(p), permNames[:]), ", ") }

// bitNames lists the bits of v by name.
func bitNames(v uint8, names []string) []string {
	list := []string{}
	for i, n := range names {
		if v&(1<<i) != 0 {
			list = append(list, n)
		}
	}
	return list
}

// Role says what a child is to its parent (rule G10). It decides permissions,
// option inheritance and file names; the child's name does not.
type Role uint8

const (
	RoleData     Role = 1 << iota // holds data visible to the parent's users
	RoleMetadata                  // holds the parent's own metadata
	RoleFiltered                  // the parent is a filter of this child
	RoleCOW                       // the parent reads from here what it does not hold itself
	RolePrimary                   // the child that stands for the parent's file name

	// RoleImage is the file below a format.
	RoleImage = RoleData | RoleMetadata | RolePrimary
)

var roleNames = [...]string{"data", "metadata", "filtered", "cow", "primary"}

// String lists the roles by name, joined by "+".
func (r Role) String() string { return strings.Join(bitNames(uint8(r), roleNames[:]), "+") }

// childPerm gives what an edge needs of its child, and shares, when the parent's
// own users hold perm and share shared (rule G13).
func childPerm(role Role, parentWritable, noIO, forceShare bool, perm, shared Perm) (Perm, Perm) {
	var p, s Perm
	switch {
	case role&RoleFiltered != 0:
		p, s = perm, shared
	case role&RoleCOW != 0:
		p = perm & PermConsistentRead
		s = PermConsistentRead | PermWriteUnchanged
		if shared&PermWrite != 0 {
			s |= PermWrite | PermResize
		}
	default:
		p, s = perm, shared
		if role&RoleMetadata != 0 {
			if parentWritable {
				p |= PermWrite | PermResize
			}
			if !noIO {
				p |= PermConsistentRead
			}
			s &^= PermWrite | PermResize
		}
		if role&RoleData != 0 {
			s &^= PermResize
			if p&PermWriteUnchanged != 0 {
				p |= PermWrite
			}
			if p&PermWrite != 0 {
				p |= PermResize
			}
		}
	}
	if noIO {
		p = 0
	}
	if forceShare {
		s = PermAll
	}
	return p, s
}
