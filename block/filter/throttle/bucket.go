package throttle

// A bucket leaks at the rate of a limit; what passes flows in. Over its size, requests
// wait until it has leaked enough. The units are bytes or requests.
type bucket struct {
	avg, max, length float64 // per second, per second, seconds
	level            float64
	burst            float64 // the level of a second bucket, which keeps a long burst to its rate
}

func newBucket(r rate) bucket {
	return bucket{avg: float64(r.avg), max: float64(r.max), length: float64(r.length)}
}

// leak lets seconds pass.
func (b *bucket) leak(seconds float64) {
	b.level = max(0, b.level-b.avg*seconds)
	b.burst = max(0, b.burst-b.max*seconds)
}

// add fills in n units, or takes them out again if n is negative.
func (b *bucket) add(n float64) {
	if b.avg == 0 {
		return
	}
	b.level = max(0, b.level+n)
	if b.length > 1 {
		b.burst = max(0, b.burst+n)
	}
}

// wait is for how many seconds nothing may pass.
func (b *bucket) wait() float64 {
	if b.avg == 0 {
		return 0
	}
	if b.max == 0 {
		return (b.level - b.avg/10) / b.avg
	}
	w := (b.level - b.max*b.length) / b.avg
	if b.length > 1 {
		w = max(w, (b.burst-b.max/10)/b.max)
	}
	return w
}
