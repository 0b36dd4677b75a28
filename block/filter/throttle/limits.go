package throttle

import (
	"fmt"

	"github.com/nbdserve/nbdserve/block"
)

// Limits are how much may pass per second, in bytes (bps) and requests (iops), over all
// requests (total) or for reads and writes apart. 0 means no limit, for each.
//
// A limit is a leaky bucket that runs out at that rate. X-max is the rate of a burst,
// and X-max-length for how many seconds it may last; then the limit holds. Without a
// burst a tenth of a second's worth may pass at once.
type Limits struct {
	BpsTotal          int64 `option:"bps-total,strong"`
	BpsTotalMax       int64 `option:"bps-total-max,strong"`
	BpsTotalMaxLength int64 `option:"bps-total-max-length,strong"` // seconds, 1 or more

	BpsRead          int64 `option:"bps-read,strong"`
	BpsReadMax       int64 `option:"bps-read-max,strong"`
	BpsReadMaxLength int64 `option:"bps-read-max-length,strong"`

	BpsWrite          int64 `option:"bps-write,strong"`
	BpsWriteMax       int64 `option:"bps-write-max,strong"`
	BpsWriteMaxLength int64 `option:"bps-write-max-length,strong"`

	IopsTotal          int64 `option:"iops-total,strong"`
	IopsTotalMax       int64 `option:"iops-total-max,strong"`
	IopsTotalMaxLength int64 `option:"iops-total-max-length,strong"`

	IopsRead          int64 `option:"iops-read,strong"`
	IopsReadMax       int64 `option:"iops-read-max,strong"`
	IopsReadMaxLength int64 `option:"iops-read-max-length,strong"`

	IopsWrite          int64 `option:"iops-write,strong"`
	IopsWriteMax       int64 `option:"iops-write-max,strong"`
	IopsWriteMaxLength int64 `option:"iops-write-max-length,strong"`

	// IopsSize is the length in bytes that counts as one request; a longer one counts
	// as several. 0: each request counts as one.
	IopsSize int64 `option:"iops-size,strong"`
}

// None are limits that limit nothing: what to start from.
func None() Limits {
	return Limits{BpsTotalMaxLength: 1, BpsReadMaxLength: 1, BpsWriteMaxLength: 1,
		IopsTotalMaxLength: 1, IopsReadMaxLength: 1, IopsWriteMaxLength: 1}
}

// maxValue bounds rates, and what a burst may hold.
const maxValue = 1_000_000_000_000_000

// A rate is the settings of one bucket.
type rate struct{ avg, max, length int64 }

// The buckets, in the order of Limits.
const (
	bpsTotal = iota
	bpsRead
	bpsWrite
	iopsTotal
	iopsRead
	iopsWrite
	numBuckets
)

func (l *Limits) rates() [numBuckets]rate {
	return [...]rate{
		bpsTotal:  {l.BpsTotal, l.BpsTotalMax, l.BpsTotalMaxLength},
		bpsRead:   {l.BpsRead, l.BpsReadMax, l.BpsReadMaxLength},
		bpsWrite:  {l.BpsWrite, l.BpsWriteMax, l.BpsWriteMaxLength},
		iopsTotal: {l.IopsTotal, l.IopsTotalMax, l.IopsTotalMaxLength},
		iopsRead:  {l.IopsRead, l.IopsReadMax, l.IopsReadMaxLength},
		iopsWrite: {l.IopsWrite, l.IopsWriteMax, l.IopsWriteMaxLength},
	}
}

// Validate tells what is wrong with the limits. The error wraps [block.ErrInvalid].
func (l *Limits) Validate() error {
	if text := l.fault(); text != "" {
		return &limitsError{text}
	}
	return nil
}

func (l *Limits) fault() string {
	rates := l.rates()
	for _, r := range [][]rate{rates[bpsTotal:iopsTotal], rates[iopsTotal:]} {
		total, read, write := r[0], r[1], r[2]
		if total.avg != 0 && (read.avg != 0 || write.avg != 0) || total.max != 0 && (read.max != 0 || write.max != 0) {
			return "bps/iops/max total values and read/write values cannot be used at the same time"
		}
	}
	if l.IopsSize < 0 {
		return "iops size cannot be negative"
	}
	if l.IopsSize != 0 && l.IopsTotal == 0 && l.IopsRead == 0 && l.IopsWrite == 0 {
		return "iops size requires an iops value to be set"
	}
	for _, r := range rates {
		switch {
		case r.avg < 0 || r.avg > maxValue || r.max < 0 || r.max > maxValue:
			return fmt.Sprintf("bps/iops/max values must be within [0, %d]", maxValue)
		case r.length == 0:
			return "the burst length cannot be 0"
		case r.length < 0:
			return "the burst length cannot be negative"
		case r.length > 1 && r.max == 0:
			return "burst length set without burst rate"
		case r.max != 0 && r.length > maxValue/r.max:
			return "burst length too high for this burst rate"
		case r.max != 0 && r.avg == 0:
			return "bps_max/iops_max require corresponding bps/iops values"
		case r.max != 0 && r.max < r.avg:
			return "bps_max/iops_max cannot be lower than bps/iops"
		}
	}
	return ""
}

type limitsError struct{ text string }

func (e *limitsError) Error() string { return e.text }
func (e *limitsError) Unwrap() error { return block.ErrInvalid }
