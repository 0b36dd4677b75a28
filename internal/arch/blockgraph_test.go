package arch

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// docs/block-graph.md is kept true: what it names exists, each rule has its tests, and
// each function of the seed its row.

const (
	repo     = "../.."
	graphDoc = "docs/block-graph.md"
)

// seedFunctions are the functions that QEMU's block.c defines.
const seedFunctions = `
append_open_options bdrv_abort_perm_update bdrv_add_aio_context_notifier bdrv_add_child bdrv_amend_options bdrv_append
bdrv_append_temp_snapshot bdrv_assign_node_name bdrv_attach_aio_context bdrv_attach_child bdrv_backing_attach
bdrv_backing_detach bdrv_backing_options bdrv_backing_update_filename bdrv_can_set_read_only bdrv_can_store_new_dirty_bitmap
bdrv_can_write_zeroes_with_unmap bdrv_chain_contains bdrv_change_backing_file bdrv_check bdrv_check_co_entry bdrv_check_perm
bdrv_check_update_perm bdrv_child_abort_perm_update bdrv_child_cb_attach bdrv_child_cb_detach bdrv_child_cb_drained_begin
bdrv_child_cb_drained_end bdrv_child_cb_drained_poll bdrv_child_cb_inactivate bdrv_child_check_perm bdrv_child_get_parent_desc
bdrv_child_perm bdrv_child_set_perm bdrv_child_try_set_perm bdrv_child_user_desc bdrv_close bdrv_close_all bdrv_co_check
bdrv_co_invalidate_cache bdrv_coroutine_enter bdrv_create bdrv_create_co_entry bdrv_create_file bdrv_debug_breakpoint
bdrv_debug_event bdrv_debug_is_suspended bdrv_debug_remove_breakpoint bdrv_debug_resume bdrv_del_child bdrv_delete
bdrv_detach_aio_context bdrv_detach_child bdrv_do_find_format bdrv_do_find_protocol bdrv_do_remove_aio_context_notifier
bdrv_drop_intermediate bdrv_eject bdrv_fill_options bdrv_filter_default_perms bdrv_find_backing_image bdrv_find_base
bdrv_find_format bdrv_find_node bdrv_find_overlay bdrv_find_protocol bdrv_format_default_perms bdrv_get_aio_context
bdrv_get_aio_wait bdrv_get_allocated_file_size bdrv_get_backing_filename bdrv_get_cumulative_perm bdrv_get_device_name
bdrv_get_device_or_node_name bdrv_get_encrypted_filename bdrv_get_flags bdrv_get_format_name bdrv_get_full_backing_filename
bdrv_get_full_backing_filename_from_filename bdrv_get_geometry bdrv_get_info bdrv_get_node_name bdrv_get_parent_name
bdrv_get_specific_info bdrv_getlength bdrv_has_zero_init bdrv_has_zero_init_1 bdrv_img_create bdrv_inactivate_all
bdrv_inactivate_recurse bdrv_inherited_fmt_options bdrv_inherited_options bdrv_init bdrv_init_with_whitelist
bdrv_invalidate_cache bdrv_invalidate_cache_all bdrv_invalidate_cache_co_entry bdrv_is_encrypted bdrv_is_first_non_filter
bdrv_is_inserted bdrv_is_read_only bdrv_is_sg bdrv_is_whitelisted bdrv_is_writable bdrv_is_writable_after_reopen
bdrv_iterate_format bdrv_join_options bdrv_lock_medium bdrv_lookup_bs bdrv_measure bdrv_min_mem_align bdrv_named_nodes_list
bdrv_nb_sectors bdrv_new bdrv_new_open_driver bdrv_next_all_states bdrv_next_node bdrv_op_block bdrv_op_block_all
bdrv_op_blocker_is_empty bdrv_op_is_blocked bdrv_op_unblock bdrv_op_unblock_all bdrv_open bdrv_open_backing_file
bdrv_open_blockdev_ref bdrv_open_child bdrv_open_child_bs bdrv_open_common bdrv_open_driver bdrv_open_flags bdrv_open_inherit
bdrv_opt_mem_align bdrv_parent_cb_change_media bdrv_parse_cache_mode bdrv_parse_discard_flags bdrv_parse_filename_strip_prefix
bdrv_perm_names bdrv_probe_all bdrv_probe_blocksizes bdrv_probe_geometry bdrv_recurse_is_first_non_filter bdrv_ref
bdrv_refresh_filename bdrv_register bdrv_remove_aio_context_notifier bdrv_reopen bdrv_reopen_abort bdrv_reopen_commit
bdrv_reopen_get_flags bdrv_reopen_multiple bdrv_reopen_perm bdrv_reopen_prepare bdrv_reopen_queue bdrv_reopen_queue_child
bdrv_replace_child bdrv_replace_child_noperm bdrv_replace_node bdrv_root_attach_child bdrv_root_unref_child bdrv_set_aio_context
bdrv_set_backing_hd bdrv_set_perm bdrv_set_read_only bdrv_temp_snapshot_options bdrv_unallocated_blocks_are_zero bdrv_unref
bdrv_unref_child bdrv_uses_whitelist check_to_replace_node find_hdev_driver find_image_format find_parent_in_reopen_queue
get_tmp_filename is_windows_drive is_windows_drive_prefix parse_json_filename parse_json_protocol path_combine path_has_protocol
path_is_absolute qsort_strcmp refresh_total_sectors should_update_child update_flags_from_options update_options_from_flags
`

// seedNames are its variables and types, and the callbacks that it calls.
const seedNames = `
BdrvChildRole.activate BdrvChildRole.attach BdrvChildRole.change_media BdrvChildRole.detach BdrvChildRole.drained_begin
BdrvChildRole.drained_end BdrvChildRole.drained_poll BdrvChildRole.get_name BdrvChildRole.get_parent_desc
BdrvChildRole.inactivate BdrvChildRole.inherit_options BdrvChildRole.parent_is_bds BdrvChildRole.stay_at_node
BdrvChildRole.update_filename BdrvOpBlocker BlockDriver.bdrv_abort_perm_update BlockDriver.bdrv_add_child
BlockDriver.bdrv_amend_options BlockDriver.bdrv_attach_aio_context BlockDriver.bdrv_can_store_new_dirty_bitmap
BlockDriver.bdrv_change_backing_file BlockDriver.bdrv_check_perm BlockDriver.bdrv_child_perm BlockDriver.bdrv_close
BlockDriver.bdrv_co_check BlockDriver.bdrv_co_create_opts BlockDriver.bdrv_co_drain_begin BlockDriver.bdrv_co_invalidate_cache
BlockDriver.bdrv_debug_breakpoint BlockDriver.bdrv_debug_event BlockDriver.bdrv_debug_is_suspended
BlockDriver.bdrv_debug_remove_breakpoint BlockDriver.bdrv_debug_resume BlockDriver.bdrv_del_child
BlockDriver.bdrv_detach_aio_context BlockDriver.bdrv_eject BlockDriver.bdrv_file_open BlockDriver.bdrv_get_allocated_file_size
BlockDriver.bdrv_get_info BlockDriver.bdrv_get_specific_info BlockDriver.bdrv_getlength BlockDriver.bdrv_has_zero_init
BlockDriver.bdrv_inactivate BlockDriver.bdrv_is_inserted BlockDriver.bdrv_join_options BlockDriver.bdrv_lock_medium
BlockDriver.bdrv_measure BlockDriver.bdrv_needs_filename BlockDriver.bdrv_open BlockDriver.bdrv_parse_filename
BlockDriver.bdrv_probe BlockDriver.bdrv_probe_blocksizes BlockDriver.bdrv_probe_device BlockDriver.bdrv_probe_geometry
BlockDriver.bdrv_recurse_is_first_non_filter BlockDriver.bdrv_refresh_filename BlockDriver.bdrv_reopen_abort
BlockDriver.bdrv_reopen_bitmaps_rw BlockDriver.bdrv_reopen_commit BlockDriver.bdrv_reopen_prepare BlockDriver.bdrv_set_perm
BlockDriver.create_opts BlockDriver.format_name BlockDriver.has_variable_length BlockDriver.instance_size BlockDriver.is_filter
BlockDriver.protocol_name BlockDriver.supports_backing BlockReopenQueueEntry CheckCo CreateCo InvalidateCacheCo all_bdrv_states
bdrv_drivers bdrv_runtime_opts child_backing child_file child_format graph_bdrv_states use_bdrv_whitelist
`

// meaningless is all that the seed has and an export server need not have.
var meaningless = []string{"AioContext", "coroutine entry", "Windows drive names", "eject and tray", "geometry", "sg"}

// A source is what the Go files of the repository declare.
type source struct {
	packages map[string]bool // by the name of their folder
	symbols  map[string]bool // "block.Graph", "block.Graph.Replace"
	tests    map[string]bool
}

var testFunc = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`)

func readSource(t *testing.T) *source {
	t.Helper()
	s := &source{packages: map[string]bool{}, symbols: map[string]bool{}, tests: map[string]bool{}}
	folders := map[string]string{}
	err := filepath.WalkDir(repo, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != repo && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata"):
			return filepath.SkipDir
		case d.IsDir() || !strings.HasSuffix(path, ".go"):
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if strings.HasSuffix(path, "_test.go") {
			for _, m := range testFunc.FindAllSubmatch(text, -1) {
				s.tests[string(m[1])] = true
			}
			return nil
		}
		folder := filepath.Dir(path)
		pkg := filepath.Base(folder)
		if other := folders[pkg]; other != "" && other != folder {
			return fmt.Errorf("%s and %s have one name", folder, other)
		}
		folders[pkg], s.packages[pkg] = folder, true
		file, err := parser.ParseFile(token.NewFileSet(), path, text, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		for _, d := range file.Decls {
			s.declare(pkg, d)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// declare enters what d declares, members of types included.
func (s *source) declare(pkg string, d ast.Decl) {
	if f, ok := d.(*ast.FuncDecl); ok {
		name := f.Name.Name
		if f.Recv != nil {
			name = receiver(f.Recv.List[0].Type) + "." + name
		}
		s.symbols[pkg+"."+name] = true
		return
	}
	for _, spec := range d.(*ast.GenDecl).Specs {
		switch spec := spec.(type) {
		case *ast.ValueSpec:
			for _, n := range spec.Names {
				s.symbols[pkg+"."+n.Name] = true
			}
		case *ast.TypeSpec:
			name := pkg + "." + spec.Name.Name
			s.symbols[name] = true
			var members *ast.FieldList
			switch t := spec.Type.(type) {
			case *ast.StructType:
				members = t.Fields
			case *ast.InterfaceType:
				members = t.Methods
			default:
				continue
			}
			for _, m := range members.List {
				for _, n := range m.Names {
					s.symbols[name+"."+n.Name] = true
				}
			}
		}
	}
}

// receiver is the name of a method's type.
func receiver(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.StarExpr:
		return receiver(e.X)
	case *ast.IndexExpr:
		return receiver(e.X)
	case *ast.Ident:
		return e.Name
	}
	return ""
}

var (
	code       = regexp.MustCompile("`([^`]+)`")
	symbolName = regexp.MustCompile(`^([a-z]\w*)(\.[A-Za-z_]\w*){1,2}$`)
	testName   = regexp.MustCompile(`^(Test|Fuzz)\w+$`)
	pathName   = regexp.MustCompile(`^[\w.-]+(/[\w.-]*)+$`)
)

// isName tells whether text in code type is a name that must exist.
func isName(text string) bool {
	return symbolName.MatchString(text) || testName.MatchString(text) || pathName.MatchString(text)
}

// fault tells what is wrong with a name, "" for nothing.
func (s *source) fault(name string) string {
	switch {
	case testName.MatchString(name):
		if !s.tests[name] {
			return "there is no test " + name
		}
	case pathName.MatchString(name):
		if _, err := os.Stat(filepath.Join(repo, name)); err != nil {
			return err.Error()
		}
	case !s.symbols[name]:
		if pkg, _, _ := strings.Cut(name, "."); !s.packages[pkg] {
			return "there is no package " + pkg + " for " + name
		}
		return "there is no " + name
	}
	return ""
}

// names lists what is in code type in text.
func names(text string) []string {
	var list []string
	for _, m := range code.FindAllStringSubmatch(text, -1) {
		list = append(list, m[1])
	}
	return list
}

// onlyNames tells whether text is a list of names that must exist, and not empty.
func onlyNames(text string) bool {
	list := names(text)
	return len(list) > 0 && !slices.ContainsFunc(list, func(n string) bool { return !isName(n) }) &&
		strings.Trim(code.ReplaceAllString(text, ""), ", ") == ""
}

// section is the part of the document from the heading that begins with that text to
// the next of its level.
func section(t *testing.T, doc, heading string) string {
	t.Helper()
	_, rest, ok := strings.Cut(doc, "\n## "+heading)
	if !ok {
		t.Fatalf("%s has no section '%s'", graphDoc, heading)
	}
	text, _, _ := strings.Cut(rest, "\n## ")
	return text
}

// rows lists the rows of the tables in text, without heads, that have n cells.
func rows(t *testing.T, text string, n int) [][]string {
	t.Helper()
	var list [][]string
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		isHead := i+1 < len(lines) && strings.HasPrefix(lines[i+1], "|-")
		if !strings.HasPrefix(line, "|") || strings.HasPrefix(line, "|-") || isHead {
			continue
		}
		cells := strings.Split(strings.Trim(line, "|"), "|")
		if len(cells) != n {
			t.Errorf("%d cells, want %d: %s", len(cells), n, line)
			continue
		}
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		list = append(list, cells)
	}
	return list
}

// isMeaningless tells whether home says that there need be none, for a reason that counts.
func isMeaningless(home string) bool {
	reason, ok := strings.CutPrefix(home, "no meaning here: ")
	reason, _, _ = strings.Cut(reason, ";")
	return ok && slices.Contains(meaningless, reason)
}

func readGraphDoc(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(repo, graphDoc))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestBlockGraphNamesWhatThereIs(t *testing.T) {
	s := readSource(t)
	for i, line := range strings.Split(readGraphDoc(t), "\n") {
		for _, n := range names(line) {
			if isName(n) {
				if f := s.fault(n); f != "" {
					t.Errorf("%s:%d: %s", graphDoc, i+1, f)
				}
			}
		}
	}
}

func TestBlockGraphHasTestsOfEachRule(t *testing.T) {
	seen := map[string]bool{}
	for _, r := range rows(t, section(t, readGraphDoc(t), "The rules"), 4) {
		rule, where, tests := r[0], r[2], r[3]
		seen[rule] = true
		if isMeaningless(where) {
			if tests != "" {
				t.Errorf("%s: '%s' has tests", rule, where)
			}
			continue
		}
		if !onlyNames(where) {
			t.Errorf("%s: '%s' is no list of names", rule, where)
		}
		if !onlyNames(tests) || slices.ContainsFunc(names(tests), func(n string) bool { return !testName.MatchString(n) }) {
			t.Errorf("%s: '%s' is no list of tests", rule, tests)
		}
	}
	for i := 1; i <= 36; i++ {
		rule := fmt.Sprintf("G%d", i)
		if !seen[rule] {
			t.Errorf("rule %s is missing", rule)
		}
		delete(seen, rule)
	}
	for rule := range seen {
		t.Errorf("there is no rule %s", rule)
	}
}

func TestBlockGraphMapsAllOfTheSeed(t *testing.T) {
	doc := readGraphDoc(t)
	for heading, want := range map[string]string{"QEMU's block.c": seedFunctions, "Its variables": seedNames} {
		list := strings.Fields(want)
		if !slices.IsSorted(list) {
			t.Errorf("the names of '%s' are not sorted", heading)
		}
		rowsOf := map[string]int{}
		for _, r := range rows(t, section(t, doc, heading), 3) {
			for _, name := range names(r[0]) {
				rowsOf[name]++
				if f := homeFault(name, r[1]); f != "" {
					t.Errorf("%s: %s", name, f)
				}
			}
		}
		for _, name := range list {
			if rowsOf[name] != 1 {
				t.Errorf("%s has %d rows", name, rowsOf[name])
			}
			delete(rowsOf, name)
		}
		for name := range rowsOf {
			t.Errorf("the seed has no %s", name)
		}
	}
}

// homeFault tells what is wrong with what the document says to be the home of a name.
func homeFault(name, home string) string {
	if !isMeaningless(home) && !onlyNames(home) {
		return "'" + home + "' is no home"
	}
	return ""
}

// The checks above find what they look for.
func TestBlockGraphChecksCanFail(t *testing.T) {
	s := readSource(t)
	for _, n := range []string{"block.Graph", "block.Graph.Replace", "block.Config.Ref", "block.Permitter.CheckPerm", "nbdserve.drivers", "block/seam.go", "formats/", "TestImportsRunOneWay"} {
		if f := s.fault(n); !isName(n) || f != "" {
			t.Errorf("%s: %s", n, f)
		}
	}
	for _, n := range []string{"block.Nonesuch", "block.Graph.Nonesuch", "nonesuch.Graph", "block/nonesuch.go", "TestNonesuch"} {
		if !isName(n) || s.fault(n) == "" {
			t.Errorf("%s is said to exist", n)
		}
	}
	for home, ok := range map[string]bool{
		"`block.Graph`, `block.Node`": true, "no meaning here: sg": true, "no meaning here: AioContext; a remark": true,
		"": false, "block.Graph": false, "`block.Graph` and more": false, "`something`": false, "no meaning here: too hard": false, "not built": false,
	} {
		if got := homeFault("bdrv_open", home) == ""; got != ok {
			t.Errorf("home '%s' is accepted: %t", home, got)
		}
	}
}
