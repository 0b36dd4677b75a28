package qcow2

// Rules are the ordering rules by name, for tests that break them one at a time.
var Rules = map[string]orderingRule{
	"R1 data before the L2 entry":                 ruleDataFirst,
	"R1 refcount before the L2 entry":             ruleRefcountFirst,
	"R1 L2 entry removed before refcount falls":   ruleRemoveFirst,
	"R2 flush between data and L2 entry":          ruleFlushData,
	"R3 table before what leads to it":            ruleTableFirst,
	"R4 refcount block before its table entry":    ruleBlockFirst,
	"R5 refcounts before the dirty bit":           ruleDirtyLast,
	"R6 wait for allocations in flight":           ruleWaitAllocation,
	"limbo: no reuse before the last user's gone": ruleLimbo,
}

// Break makes nodes opened with o break a rule of [Rules].
func (o *Options) Break(rule orderingRule) { o.broken |= rule }
