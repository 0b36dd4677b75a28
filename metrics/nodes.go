package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/nbdserve/nbdserve/block"
)

const nodePrefix = "nbdserve_node_"

var (
	nodeRequests = prometheus.NewDesc(nodePrefix+"requests_total",
		"Requests that reached the node, located reads included.", []string{"node", "driver", "op"}, nil)
	nodeBytes = prometheus.NewDesc(nodePrefix+"request_bytes_total",
		"Bytes that those requests read or wrote.", []string{"node", "driver", "op"}, nil)
)

// nodeCollector publishes what nodes count: the requests that reach them, and
// what their drivers measure ([block.Measurer]). What a driver measures is known
// only at the scrape, so nothing is described beforehand.
type nodeCollector struct{ source Source }

func (c *nodeCollector) Describe(chan<- *prometheus.Desc) {}

func (c *nodeCollector) Collect(ch chan<- prometheus.Metric) {
	measured := make(map[string]*prometheus.Desc) // one for all drivers that measure the same
	for _, n := range c.source.Nodes() {
		node, driver := n.Name(), n.Driver().Name
		count := func(d *prometheus.Desc, op string, v int64) {
			ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), node, driver, op)
		}
		s := n.Stats()
		count(nodeRequests, "read", s.Reads)
		count(nodeRequests, "write", s.Writes)
		count(nodeRequests, "write_zeroes", s.Zeroes)
		count(nodeRequests, "trim", s.Discards)
		count(nodeRequests, "flush", s.Flushes)
		count(nodeRequests, "block_status", s.Statuses)
		count(nodeBytes, "read", s.ReadBytes)
		count(nodeBytes, "write", s.WriteBytes)

		m, ok := n.Instance().(block.Measurer)
		if !ok {
			continue
		}
		for _, f := range m.Measurements() {
			d := measured[f.Name]
			if d == nil {
				d = prometheus.NewDesc(nodePrefix+f.Name, f.Help, []string{"node", "driver"}, nil)
				measured[f.Name] = d
			}
			t := prometheus.GaugeValue
			if f.Counter {
				t = prometheus.CounterValue
			}
			ch <- prometheus.MustNewConstMetric(d, t, f.Value, node, driver)
		}
	}
}
