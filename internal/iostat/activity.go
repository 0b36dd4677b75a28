package iostat

// Activity tells how the nodes of an export were activated and inactivated.
type Activity struct {
	Active                             bool // locked by us
	Activations, ActivationsFailed     int64
	Inactivations, InactivationsFailed int64
}
