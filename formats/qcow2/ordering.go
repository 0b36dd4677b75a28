package qcow2

import "slices"

// An orderingRule is one of the rules of writing that keep an image readable
// whatever the moment of a crash. Tests break them one at a time to prove that the
// crash test notices; nothing else sets them.
type orderingRule uint16

const (
	// ruleDataFirst: the data of a new cluster, and what is copied around it, is
	// written before its L2 entry changes (R1).
	ruleDataFirst orderingRule = 1 << iota
	// ruleRefcountFirst: a refcount that rises is on disk before an L2 entry that needs it (R1).
	ruleRefcountFirst
	// ruleRemoveFirst: an L2 entry that goes is off the disk before the refcount falls (R1).
	ruleRemoveFirst
	// ruleFlushData: the file is flushed between new data and the L2 entries (R2).
	ruleFlushData
	// ruleTableFirst: an L2 table is on disk before the L1 entry, a grown refcount
	// table before the header (R3).
	ruleTableFirst
	// ruleBlockFirst: a refcount block is on disk before its entry in the refcount table (R4).
	ruleBlockFirst
	// ruleDirtyLast: rebuilt refcounts are on disk before the dirty bit is cleared (R5).
	ruleDirtyLast
	// ruleWaitAllocation: requests wait for an allocation in flight in their range (R6).
	ruleWaitAllocation
	// ruleLimbo: a freed cluster is reused only when its removal is on disk and no
	// request that may know it is left.
	ruleLimbo
)

// rearrange returns the steps of a round with the broken rules broken.
func (b orderingRule) rearrange(steps []step) []step {
	if b == 0 {
		return steps
	}
	without := func(s step) {
		steps = slices.DeleteFunc(steps, func(o step) bool { return o == s })
	}
	if b&ruleFlushData != 0 {
		if i := slices.Index(steps, stepL2); steps[i-1] == stepFlush {
			steps = slices.Delete(steps, i-1, i)
		}
	}
	if b&ruleRefcountFirst != 0 {
		without(stepRefcounts)
		steps = slices.Insert(steps, len(steps)-1, stepRefcounts)
	}
	if b&ruleTableFirst != 0 {
		without(stepL1)
		steps = slices.Insert(steps, 0, stepL1)
	}
	if b&ruleBlockFirst != 0 {
		without(stepRefcountTable)
		steps = slices.Insert(steps, 0, stepRefcountTable)
	}
	return steps
}
